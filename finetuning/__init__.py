"""What run_chatglm_lora.py leans on, one question a file. docs/architecture.md shows who may know whom."""

__version__ = "0.2.0"
