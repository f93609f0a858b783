"""Merge a LoRA adapter into its base model: a complete folder that needs neither PEFT nor the adapter.

    python scripts/merge_lora.py ADAPTER OUT [--format native] [--dtype bfloat16] [--base_model FOLDER]

`published` keeps the names, the layout and the code files of the base; it works for every model whose adapter sits in
linear layers or embeddings. `native` writes ChatGLM2, CodeGeeX2, ChatGLM3 and GLM-4 as transformers' GlmForCausalLM,
which loads without remote code. The result is opened in a fresh process and its logits are compared with those of base
and adapter; OUT appears when all that is done, and not before.

Weights are read and written one shard at a time. The comparison afterwards needs room for one copy of the model.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or hub name of a LoRA adapter")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument("--format", choices=["published", "native"], default="published")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: as the base is stored")
    parser.add_argument("--base_model", help="the base, where it is not at the place noted in the adapter")
    parser.add_argument("--max_shard_size", default="2GB", help="of the files written; the memory needed goes with it")
    parser.add_argument("--ollama", action="store_true", help="write a Modelfile too (ChatGLM3 and GLM-4)")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--adapter_only", action="store_true", help="the adapter alone, for the native layout")
    parts.add_argument("--base_only", action="store_true", help="the base alone: what --adapter_only adapts")
    arguments = parser.parse_args()
    if arguments.adapter_only and arguments.format != "native":
        parser.error("--adapter_only changes the layout of an adapter: it goes with --format native")
    if arguments.adapter_only and arguments.ollama:
        parser.error("--ollama is for a merged model: leave it or --adapter_only out")
    return arguments


def main():
    arguments = parsed_arguments()

    import transformers  # late, as all that imports torch: --help and mistakes in the flags need none
    from merging.comparing import compared
    from merging.modelfile import check_ollama, write_modelfile
    from merging.native_export import write_adapter
    from merging.weights import Merge, remarks
    from merging.writing import unfinished, write_companions, write_weights

    from finetuning.self_checks import SelfCheckFailed

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with unfinished(arguments.out) as folder:
            merge = Merge(arguments)
            if arguments.ollama:
                check_ollama(merge)
                write_modelfile(merge, folder)
            for remark in remarks(merge):
                print(remark, flush=True)
            if arguments.adapter_only:
                write_adapter(merge, folder)
            else:
                write_weights(merge, folder)
                write_companions(merge, folder)
                print("Comparing the logits with those of base and adapter ...", flush=True)
                difference = compared(merge, folder)
                print(f"The same model: largest difference of a logit {difference:.2g}.")
    except (OSError, ValueError, SelfCheckFailed) as error:
        sys.exit(f"Nothing was written: {error}")
    print(f"Wrote {arguments.out}")


if __name__ == "__main__":
    main()
