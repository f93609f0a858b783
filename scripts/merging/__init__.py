"""Adapters as weights, for merge_lora.py and add_adapters.py.

weights -> writing -> comparing    (base and adapter, layer by layer; the merged folder; is it the same model?)
native_export, modelfile           (what goes into a folder for transformers' own class, and for Ollama)
adding                             (several adapters as one)
"""
