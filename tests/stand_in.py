"""Stand-ins for run_clm.py as it was at any date since April 2023, rendered from one template."""

from pathlib import Path

from jinja2 import Environment


TEMPLATE = Path(__file__).with_name("run_clm_stand_in.py.jinja")
OLDEST, RUNS_TODAY, NEWEST = 20230322, 20250926, 20260108
# A date for each shape: the days on which code changed, not only words or a version floor.
SHAPES = (
    OLDEST, 20230518, 20230728, 20230802, 20230807, 20231004, 20231115, 20231211, 20240111, 20240311, 20240408,
    20240517, 20240617, 20241002, 20250612, 20250715, 20250725, 20250729, 20250822, RUNS_TODAY, 20251009, NEWEST,
)  # fmt: skip


def floor_before(date) -> str:
    """The lowest version of transformers that was asked for before 29 August 2025; three of its steps."""
    return "4.28.0.dev0" if date < 20230802 else "4.32.0.dev0" if date < 20230905 else "4.40.0.dev0"


def stand_in(date) -> str:
    """The text of the stand-in for one date."""
    positions = "max_pos_embeddings" if date >= 20231115 else "config.max_position_embeddings"
    value = (
        "token=model_args.token,"
        if date >= 20230802
        else "use_auth_token=True if model_args.use_auth_token else None,"
    )
    key, _, rest = value.partition("=")
    return (
        Environment(keep_trailing_newline=True)
        .from_string(TEMPLATE.read_text(encoding="utf-8"))
        .render(
            date=date,
            floor="4.57.0.dev0" if date >= 20250829 else floor_before(date),
            dtype="dtype" if date >= 20250822 else "torch_dtype",
            xla="is_torch_xla_available" if date >= 20240311 else "is_torch_tpu_available",
            keys="" if date >= 20250729 else ".keys()",
            more="    " if date >= 20250715 else "",
            token=value,
            token_item=f'"{key}": {rest}',
            positions=positions if date >= 20231004 else "1024",
            opt=lambda kind: f"{kind} | None" if date >= 20260108 else f"Optional[{kind}]",
        )
    )
