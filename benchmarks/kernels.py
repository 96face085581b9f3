"""The GPU kernels against their peers in one run: `python benchmarks/kernels.py --json kernels.json`.

`kernel_groups/` has the rows, a file for each kind of kernel, and `kernel_groups/timing.py` how a row is timed.
A row gives the median time of a call, half the distance between the quartiles as its spread, the share of what the
same run measured as this GPU's ceiling (a copy's bandwidth, cuBLAS's rate), and the peer's median over ours. At the
end stand the bars (`kernel_groups/bars.py`): what must be reached, what is wanted, what was measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from kernel_groups.bars import bars
from kernel_groups.timing import Row

GROUPS = {
    "ceilings": "ceilings:ceiling_rows",
    "forward": "flash:forward_rows",
    "backward": "flash:backward_rows",
    "decode": "decode:decode_rows",
    "linear": "linear:linear_rows",
    "experts": "experts:expert_rows",
    "loss": "loss:loss_rows",
    "rowwise": "rowwise:rowwise_rows",
    "sample": "sample:sample_rows",
    "adamw": "optimizers:adamw_rows",
    "muon": "optimizers:muon_rows",
}


def rows_of(group: str) -> Iterator[Row]:
    """The rows of a group, each measured when it is asked for."""
    module, function = GROUPS[group].split(":")
    rows: Callable[[], Iterator[Row]] = getattr(importlib.import_module(f"kernel_groups.{module}"), function)
    return rows()


def as_json(rows: list[Row], ceilings: dict[str, float]) -> str:
    """All that was measured so far, and the bars it gives."""
    data = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": [{**asdict(r), "ratio": r.ratio, "share": r.share(ceilings)} for r in rows],
        "bars": [{**asdict(b), "met": b.met, "goal_met": b.goal_met} for b in bars(rows, ceilings)],
    }
    return json.dumps(data, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows here too, after each")
    parser.add_argument(
        "--groups",
        default=",".join(GROUPS),
        help="which, in order, after the ceilings; default: %(default)s",
    )
    arguments = parser.parse_args()
    groups = arguments.groups.split(",")
    unknown = [g for g in groups if g not in GROUPS]
    if unknown:
        sys.exit(f"no group {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    if not torch.cuda.is_available():
        sys.exit("the kernels run on CUDA devices, and torch sees none")
    torch.manual_seed(0)
    rows: list[Row] = []
    ceilings: dict[str, float] = {}
    print(torch.cuda.get_device_name(), torch.__version__)
    for group in ["ceilings", *(g for g in groups if g != "ceilings")]:
        for found in rows_of(group):
            rows.append(found)
            if group == "ceilings":
                ceilings[found.unit] = found.rate
            print(found.text(ceilings), flush=True)
            if arguments.json:
                arguments.json.write_text(as_json(rows, ceilings))
        torch.cuda.empty_cache()
    print(*(b.text() for b in bars(rows, ceilings)), sep="\n")


if __name__ == "__main__":
    main()
