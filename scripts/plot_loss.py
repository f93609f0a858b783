"""Draw losses, learning rate and tokens per second of one or several training runs.

    python scripts/plot_loss.py OUTPUT_DIR [OUTPUT_DIR ...] [--output FILE.png]

The picture is OUTPUT_DIR/training_loss.png, for several runs loss_comparison.png in the current folder.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetuning.loss_plot import PICTURE, draw


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="OUTPUT_DIR", help="--output_dir of a run, finished or not")
    parser.add_argument("--output", metavar="FILE", type=Path, help="where to write the picture")
    arguments = parser.parse_args()
    several = len(arguments.folders) > 1
    path = arguments.output or (Path("loss_comparison.png") if several else Path(arguments.folders[0], PICTURE))
    try:
        draw(arguments.folders, path)
    except ImportError:
        sys.exit("The picture needs matplotlib: pip install matplotlib")
    except (OSError, ValueError) as error:
        sys.exit(f"plot_loss.py: {error}")
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
