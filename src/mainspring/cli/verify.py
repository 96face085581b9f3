"""`mainspring verify`: a layout held against one device."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from mainspring.errors import ConfigError

if TYPE_CHECKING:
    from mainspring.parallel.layout import Layout
    from mainspring.train.verify import Roundings, Run, Verdict, VerifySettings


def verify(
    model: Annotated[
        Path, typer.Option(help="A Hugging Face directory; with a config.json alone its weights are random.")
    ],
    layout: Annotated[
        list[str] | None,
        typer.Option(help="A layout, as tp=2,pp=2,zero=1; several are held one after the other."),
    ] = None,
    pp: Annotated[int, typer.Option(help="Pipeline-parallel degree.")] = 1,
    dp: Annotated[int, typer.Option(help="Data-parallel degree.")] = 1,
    cp: Annotated[int, typer.Option(help="Context-parallel degree.")] = 1,
    tp: Annotated[int, typer.Option(help="Tensor-parallel degree.")] = 1,
    ep: Annotated[int, typer.Option(help="Expert-parallel degree, inside dp and cp.")] = 1,
    zero: Annotated[int, typer.Option(help="ZeRO stage, 0 to 3.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 3,
    micro_batches: Annotated[int, typer.Option(help="Micro-batches of a step, over all ranks.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of a micro-batch.")] = 48,
    seed: Annotated[int, typer.Option(help="Of the batches, and of random weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, float64 (sees what roundings hide) or bfloat16.")] = (
        "float32"
    ),
    numerics: Annotated[str, typer.Option(help="fast, or lockstep (sums in the order of ranks).")] = "fast",
    device: Annotated[str, typer.Option(help="cpu (gloo) or cuda (NCCL).")] = "cpu",
    against: Annotated[
        Path | None, typer.Option(help="Gradients dumped from elsewhere, in place of the one-device run.")
    ] = None,
    roundings: Annotated[
        bool,
        typer.Option(
            "--roundings",
            help="Hold against a float64 run, and allow twice what one device in --dtype is off: for deep models.",
        ),
    ] = False,
    write_batch: Annotated[
        Path | None, typer.Option(help="Write the first step's batch as safetensors and stop: for --against.")
    ] = None,
    limit: Annotated[
        float, typer.Option(help="Seconds of silence after which a hung rank ends the run.")
    ] = 120.0,
) -> None:
    """Hold a layout against one device: every parameter's gradient, the gradient's norm, the losses of some steps.

    Starts the ranks itself, or takes torchrun's. Exit status 1 if anything is out of tolerance.
    """
    from mainspring.parallel.layout import Layout
    from mainspring.train.verify import VerifySettings

    for what, value, allowed in (
        ("dtype", dtype, ("float32", "float64", "bfloat16")),
        ("numerics", numerics, ("fast", "lockstep")),
        ("device", device, ("cpu", "cuda")),
    ):
        if value not in allowed:
            raise ConfigError(f"--{what} {value}: choose among {', '.join(allowed)}")
    if roundings and against is not None:
        raise ConfigError("--roundings computes a reference of its own; leave it or --against out")
    settings = VerifySettings(
        steps, micro_batches, tokens, seed,
        cast(Literal["float32"], dtype), cast(Literal["fast"], numerics), cast(Literal["cpu"], device),
    )  # fmt: skip
    options = Layout(pp=pp, dp=dp, cp=cp, tp=tp, ep=ep, zero=zero)
    layouts = [Layout.parse(text) for text in layout or ()]
    if not layouts or options != Layout():
        layouts.append(options)
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        good = _under_torchrun(model, layouts, settings, against, roundings, limit)
    else:
        with tempfile.TemporaryDirectory(prefix="mainspring-verify-") as folder:
            good = _on_this_host(
                model, layouts, settings, against, roundings, write_batch, Path(folder), limit
            )
    if not good:
        sys.exit(1)


def _on_this_host(
    model: Path,
    layouts: list[Layout],
    settings: VerifySettings,
    against: Path | None,
    roundings: bool,
    write_batch: Path | None,
    folder: Path,
    limit: float,
) -> bool:
    from mainspring.formats.model_config import ModelConfig
    from mainspring.train.verify import judge, save_batch, seed_checkpoint
    from mainspring.train.verify_ranks import run_on_ranks

    directory = seed_checkpoint(model, settings, folder / "seed")
    config = ModelConfig.from_file(directory)
    if write_batch is not None:
        save_batch(config, settings, write_batch)
        typer.echo(f"wrote {settings.micro_batches} micro-batches to {write_batch}")
        return True
    for layout in layouts:
        layout.check(config, settings.micro_batches)
    gradients = against if against is not None else folder / "gradients.safetensors"
    reference, own = None, None
    if against is None:
        reference, own = _reference(directory, settings, gradients, roundings)
    good = True
    for number, layout in enumerate(layouts):
        run, errors = run_on_ranks(directory, layout, settings, gradients, folder / str(number), limit)
        verdict = judge(reference, run, errors, settings, own)
        _show(layout, settings, reference, run, verdict, own)
        good = good and not verdict.problems
    return good


def _under_torchrun(
    model: Path,
    layouts: list[Layout],
    settings: VerifySettings,
    against: Path | None,
    roundings: bool,
    limit: float,
) -> bool:
    from mainspring.formats.model_config import ModelConfig
    from mainspring.parallel.launch import joined
    from mainspring.parallel.mesh import Mesh
    from mainspring.train.verify import judge, model_directory, run_layout, seed_checkpoint

    if len(layouts) > 1:
        raise ConfigError(
            f"{len(layouts)} layouts under torchrun, which has started the ranks of one; name one"
        )
    layout = layouts[0]
    with joined(settings.device), tempfile.TemporaryDirectory(prefix="mainspring-verify-") as own:
        model = model_directory(model)
        config = ModelConfig.from_file(model)
        mesh = Mesh.build(layout.axes, key_copies=layout.key_copies(config))
        from mainspring.parallel.checkpoint import agreed, share_json
        from mainspring.parallel.launch import local_device

        world, place = mesh.group("world"), local_device(settings.device)
        folder = Path(share_json(own, world, place))  # a file system that all ranks see
        reference, own_errors = None, None
        with agreed(world, "run the one-device reference"):
            if world.rank == 0:
                directory = seed_checkpoint(model, settings, folder / "seed")
                if against is None:
                    reference, own_errors = _reference(
                        directory, settings, folder / "gradients.safetensors", roundings
                    )
        directory = folder / "seed" if (folder / "seed").exists() else model
        mesh.monitor.watch(limit)
        run, errors = run_layout(
            directory, layout, settings, against or folder / "gradients.safetensors", mesh
        )
        mesh.monitor.stop()
        good = True
        if world.rank == 0:
            verdict = judge(reference, run, errors, settings, own_errors)
            _show(layout, settings, reference, run, verdict, own_errors)
            good = not verdict.problems
        return bool(share_json(good, world, place))


def _reference(
    directory: Path, settings: VerifySettings, gradients: Path, roundings: bool
) -> tuple[Run, Roundings | None]:
    from mainspring.train.verify import run_reference, run_wide_reference

    if roundings:
        return run_wide_reference(directory, settings, gradients)
    return run_reference(directory, settings, gradients), None


def _show(
    layout: Layout,
    settings: VerifySettings,
    reference: Run | None,
    run: Run,
    verdict: Verdict,
    own: Roundings | None,
) -> None:
    width = max(len(name) for name in verdict.errors)
    typer.echo(f"layout {layout}: {layout.world} ranks, {settings.dtype}, {settings.numerics} numerics")
    against = f" against float64 (one device in {settings.dtype})" if own is not None else ""
    typer.echo(f"{'parameter'.ljust(width)}  error of the gradient, in norm{against}")
    for name, error in verdict.errors.items():
        beside = f" ({own.errors[name]:.2e})" if own is not None else ""
        typer.echo(f"{name.ljust(width)}  {error:.2e}{beside}")
    for step, (loss, norm) in enumerate(zip(run.losses, run.norms, strict=True)):
        beside = f" (one device {reference.losses[step]:.9g})" if reference is not None else ""
        norms = f" (one device {reference.norms[step]:.9g})" if reference is not None else ""
        typer.echo(f"step {step}: loss {loss:.9g}{beside}, gradient norm {norm:.9g}{norms}")
    for problem in verdict.problems:
        typer.echo(f"MISMATCH: {problem}")
    if verdict.problems and settings.dtype != "float64" and own is None:
        typer.echo(
            "Roundings of deep models can pass the tolerance: --roundings measures them, --dtype float64 has none."
        )
    worst = max(verdict.errors.values())
    typer.echo(
        f"verdict: {'equal to one device' if not verdict.problems else 'WRONG'}; largest gradient error {worst:.2e}"
    )
