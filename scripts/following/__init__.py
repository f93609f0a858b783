"""Following run_clm.py, for scripts/upstream.py: what a script does as facts, and our additions put into one.

reading -> facts -> comparing      (diff; what is known of upstream stands in tables)
editing, binding -> grafting       (graft)
"""
