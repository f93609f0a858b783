"""Evaluate a model or an adapter on a published set of questions: lm-evaluation-harness, with the prompt of training.

    hf download openai/gsm8k --repo-type dataset --local-dir gsm8k
    python scripts/evaluate_model.py out --task gsm8k gsm8k

FOLDER is the data set as the hub has it; nothing is fetched. MODEL is an adapter folder, a model folder or a hub name.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from answering import flags


TASKS = {"ceval": "ceval-valid", "cmmlu": "cmmlu", "gsm8k": "gsm8k"}  # as lm-evaluation-harness calls them


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_model_flags(parser)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the data set, downloaded")
    parser.add_argument("--task", required=True, help=f"{', '.join(TASKS)}, or any name that lm_eval knows")
    parser.add_argument("--num_fewshot", type=flags.at_least_0, help="examples in the prompt (default: the task's)")
    parser.add_argument("--limit", type=flags.at_least_1, help="questions of each task, for a look")
    parser.add_argument("--batch_size", type=flags.at_least_1, default=1)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    return parser.parse_args()


def main():
    arguments = parsed_arguments()
    folder, output = arguments.folder.resolve(), arguments.output
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit("evaluate_model.py needs lm-evaluation-harness: pip install lm_eval")
    if not folder.is_dir():
        sys.exit(f"evaluate_model.py: {folder} is no folder: give the one that the data set was downloaded to.")
    if output and (output.is_dir() or not output.resolve().parent.is_dir()):
        sys.exit(f"evaluate_model.py: --output {output} cannot be written: name a file in a folder that is there.")

    import lm_eval  # late, as all that imports torch: --help and mistakes need none
    from answering.harness import Evaluated, task_with_data_in
    from answering.loading import loaded
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    try:
        manager = TaskManager()
        task = task_with_data_in(folder, TASKS.get(arguments.task, arguments.task), manager)
        model = Evaluated(*loaded(arguments), arguments.batch_size)
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate_model.py: {error}")
    asked = {"tasks": [task], "task_manager": manager, "num_fewshot": arguments.num_fewshot, "limit": arguments.limit}
    try:
        results = lm_eval.simple_evaluate(model, **asked, apply_chat_template=True)
    except (OSError, ValueError, KeyError, DatasetsError, TemplateError) as error:  # of a folder with other data
        sys.exit(f"evaluate_model.py: --task {arguments.task} with {folder}: {type(error).__name__}: {error}")
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    if output:
        text = json.dumps(results["results"], ensure_ascii=False, indent=2, default=handle_non_serializable)
        output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
