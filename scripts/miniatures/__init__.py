"""Tiny random models, for tiny_chatglm.py and check_models.py.

releases, vocabularies -> checkpoints   (a ChatGLM in the files that it is published in)
architectures -> verdicts               (any causal model of transformers; how a training may batch its rows)
spreading                               (random weights for both)
"""
