"""What the process imports from which the runs are forked."""

import chatglm  # noqa: F401
import run_chatglm_lora  # noqa: F401
from finetuning import safeguards  # noqa: F401
