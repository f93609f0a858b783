"""Draw the losses of a run: python scripts/plot_loss.py OUTPUT_DIR, which writes OUTPUT_DIR/loss.png."""

import json
import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # no screen is needed
from matplotlib import pyplot  # noqa: E402


def curve(log, key):
    """Steps and values of the log entries that have `key`."""
    points = [(entry["step"], entry[key]) for entry in log if key in entry]
    return tuple(zip(*points, strict=True)) or ((), ())


def main():
    if len(sys.argv) != 2 or not Path(sys.argv[1], "trainer_state.json").is_file():
        sys.exit("usage: python scripts/plot_loss.py OUTPUT_DIR   (a folder with a trainer_state.json)")
    folder = Path(sys.argv[1])
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, label in {"loss": "training", "eval_loss": "evaluation"}.items():
        if curve(log, key)[0]:
            axes.plot(*curve(log, key), label=label)
    axes.set(xlabel="step", ylabel="loss", title=str(folder))
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120, bbox_inches="tight")
    print(f"Wrote {folder / 'loss.png'}")


if __name__ == "__main__":
    main()
