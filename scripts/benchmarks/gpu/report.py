"""What was found, as Markdown, and on which machine."""

from importlib.metadata import version

import torch


PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
GOALS = {"share_of_peak": 0.6, "idle_share": 0.05}  # of the first shape: at least, at most


def machine() -> dict:
    """The device and the versions of what computes on it."""
    on_gpu = torch.cuda.is_available()
    found = {"device": torch.cuda.get_device_name() if on_gpu else "CPU, tiny shapes"}
    if on_gpu:
        found["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            found[package] = "not installed"
    return found


def verdict(line) -> str:
    if "failed" in line:
        return "FAILED"
    return "" if "bound" not in line else "right" if line["error"] <= line["bound"] else "WRONG"


def shown(value) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {shown(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(found) -> str:
    """The results as Markdown: what is wrong first, then a table for each part."""
    lines = [f"# {found['device']}", "", ", ".join(f"{name} {found[name]}" for name in PACKAGES), ""]
    bad = [line for line in found["results"] if verdict(line) in ("WRONG", "FAILED")]
    count = len(found["results"])
    lines += [f"{count - len(bad)} of {count} are as they should be, in {found['seconds']:.0f} s.", ""]
    lines += [f"* {line['name']}: {line.get('failed') or shown(line['error'])} ({verdict(line)})" for line in bad]
    lines += ["", *goals(found["results"]), ""]
    for part in dict.fromkeys(line["part"] for line in found["results"]):
        own = [line for line in found["results"] if line["part"] == part]
        columns = list(dict.fromkeys(key for line in own for key in line if key not in ("part", "name")))
        lines += [f"## {part}", "", f"| | {' | '.join(columns)} | |", "|" + "---|" * (len(columns) + 2)]
        for line in own:
            cells = (shown(line[key]).replace("|", "/") if key in line else "" for key in columns)
            lines.append(f"| {line['name']} | {' | '.join(cells)} | {verdict(line)} |")
        lines.append("")
    return "\n".join(lines)


def goals(lines) -> list[str]:
    """What was reached of the goals, in words."""
    packed = next((line for line in lines if line["name"].endswith("ours, packed") and "share_of_peak" in line), None)
    step = next((line for line in lines if "idle_share" in line), None)
    told = []
    if packed:
        told.append(
            f"Of the matrix peak: {packed['share_of_peak']:.1%} (goal: {GOALS['share_of_peak']:.0%} at least)."
        )
    if step:
        told.append(f"Of a step without a kernel: {step['idle_share']:.1%} (goal: {GOALS['idle_share']:.0%} at most).")
    return told
