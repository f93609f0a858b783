"""A model that answers, for chat.py, serve.py and evaluate_model.py.

flags -> loading -> chatbot        (what the command line says; the model that it names; a model that answers)
terminal, chat_page, completions   (who asks a chatbot: a person here, or in the browser; another program)
harness                            (the model as lm-evaluation-harness asks it)
"""
