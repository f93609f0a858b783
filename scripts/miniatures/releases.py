"""What tells the published checkpoints of ChatGLM apart, and the flags know; no slow library is needed for it."""

SETTLED_IDS = 3 + 256  # <unk>, <s>, </s> and the bytes
RELEASES = {  # what tells the published config.json files apart
    "chatglm": {"_name_or_path": "THUDM/chatglm-6b", "transformers_version": "4.23.1", "max_sequence_length": 2048},
    "chatglm2": {"_name_or_path": "THUDM/chatglm2-6b", "transformers_version": "4.27.1", "seq_length": 32768},
    "chatglm3": {"_name_or_path": "THUDM/chatglm3-6b", "transformers_version": "4.30.2", "seq_length": 8192},
    "glm4": {
        "_name_or_path": "THUDM/glm-4-9b-chat",
        "transformers_version": "4.44.0",
        "seq_length": 131072,
        "rope_ratio": 500,
        "layernorm_epsilon": 1.5625e-07,
    },
}
MARKER = "tiny_chatglm.json"  # the arguments; also says that the folder may be written over
