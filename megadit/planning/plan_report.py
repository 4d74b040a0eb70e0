"""A plan as text, as JSON, as a row of a table, and as a recipe."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megadit.planning.machine.assumptions import Assumptions
from megadit.planning.nearest import Found
from megadit.planning.run_plan import GIB, Plan
from megadit.planning.trace import Figure
from megadit.recipe import Recipe, differences, load
from megadit.recipe.schema import Hardware


def as_text(plan: Plan, name: str) -> str:
    """The plan for a terminal."""
    blocks = [
        _lines(f"{name} on {describe(plan.hardware)}", _of_run(plan)),
        _lines(f"memory of a GPU, {plan.memory.moment}", _of_memory(plan)),
        _lines("a step", _of_step(plan)),
        _lines("data and checkpoints", _of_storage(plan)),
    ]
    return "\n\n".join([*blocks, _verdict(plan)])


def assumptions_as_text(assumed: Assumptions) -> str:
    """What plans take for granted, and why."""
    rows = [(name, f"{value:g}", why) for name, value, why in assumed.rows()]
    return _lines("assumed (--assume NAME=VALUE)", rows)


def describe(hardware: Hardware) -> str:
    return f"{hardware.num_gpus} {hardware.gpu} ({hardware.num_nodes} x {hardware.gpus_per_node})"


def found_as_text(found: Found) -> str:
    """Settings that run, as overrides, and what they give."""
    changes = " ".join(f"{key}={value}" for key, value in found.changes.items()) or "(as it is)"
    plan = found.plan
    needed = f"{plan.needed_gib:.0f} GiB of {plan.gpu.memory_gib:.0f}"
    speed = f"{plan.images_per_second():,.0f} images/s, {plan.time.exposed_share:.0%} waiting for the network"
    return f"{changes}\n  {needed}, {speed}"


def as_tree(plan: Plan) -> dict[str, Any]:
    """The plan for JSON."""
    fast, expected, slow = plan.times
    return {
        "recipe": plan.recipe.name,
        "hardware": plan.hardware.model_dump(),
        "num_parameters": plan.num_parameters,
        "flops_per_image": plan.flops_per_image,
        "memory": {
            "moment": plan.memory.moment,
            "device_bytes": {item.name: item.device_bytes for item in plan.memory.items},
            "host_bytes": plan.memory.host_peak,
            "peak_bytes": plan.memory.peak,
            "reserved_gib": plan.reserved_gib,
            "needed_gib": plan.needed_gib,
            "gpu_gib": plan.gpu.memory_gib,
        },
        "step_seconds": {
            "compute": expected.compute,
            "exposed": expected.exposed,
            "optimizer": expected.optimizer,
            "total": expected.total,
            "communication": expected.communication,
            "fast": fast.total,
            "slow": slow.total,
        },
        "images_per_second": plan.images_per_second(),
        "mfu": plan.mfu(),
        "days": plan.days(),
        "gpu_hours": plan.gpu_hours,
        "dollars": plan.dollars,
        "reading": vars(plan.reading),
        "saving": vars(plan.saving),
        "assumed": {name: value for name, value, _ in plan.assumed.rows()},
        "problems": plan.problems(),
    }


def as_recipe(found: Sequence[Found], source: str, overrides: Sequence[str], recipe: Recipe, hardware: Hardware) -> str:
    """A recipe file that extends `source` by what the overrides and the planner changed; `found` for each stage."""
    tree: dict[str, Any] = {}
    for key, (_, value) in differences(load(source), recipe).items():
        _put(tree, key, value)
    if recipe.stages:
        tree["stages"] = [_changed(stage, each.changes) for stage, each in zip(recipe.stages, found, strict=True)]
    else:
        for key, value in found[0].changes.items():
            _put(tree, key, value)
    shipped = Path(source).suffix not in (".yaml", ".yml")
    parent = source if shipped else str(Path(source).resolve())
    header = f"# By `megadit plan {' '.join([source, *overrides])}` for {describe(hardware)}.\n"
    tree |= {"hardware": hardware.model_dump()}
    return header + yaml.safe_dump({"extends": parent, "name": recipe.name, **tree}, sort_keys=False)


def _changed(stage: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    tree = copy.deepcopy(dict(stage))
    for key, value in changes.items():
        _put(tree, key, value)
    return tree


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[leaf] = value


def trace_as_text(rows: Sequence[Figure]) -> str:
    """Formulas beside what a step did."""
    header = ("", "", "formula", "traced", "difference")
    cells = [(row.what, row.unit, f"{row.formula:,}", f"{row.traced:,}", f"{row.difference:+.3%}") for row in rows]
    return _lines("a real step of one rank, without its memory", [header, *cells])


TABLE_HEADER = (
    *("recipe", "parameters", "pixels", "machine", "GiB a GPU", "images/s", "MFU"),
    *("waiting", "days", "GPU hours", "dollars"),
)


def as_row(plan: Plan, name: str) -> tuple[str, ...]:
    """Cells under TABLE_HEADER."""
    fast, _, slow = plan.times
    model = plan.recipe.model
    pixels = model.input_size if model.in_channels == 3 else 8 * model.input_size
    return (
        f"`{name}`",
        _count(plan.num_parameters),
        str(pixels),
        describe(plan.hardware),
        f"{plan.needed_gib:.0f} of {plan.gpu.memory_gib:.0f}",
        f"{plan.images_per_second():,.0f} ({plan.images_per_second(slow):,.0f} to {plan.images_per_second(fast):,.0f})",
        f"{plan.mfu():.0%}",
        f"{plan.time.exposed_share:.0%}",
        f"{plan.days():.1f}",
        f"{plan.gpu_hours:,.0f}",
        f"{plan.dollars:,.0f}",
    )


def _of_run(plan: Plan) -> list[tuple[str, ...]]:
    fast, _, slow = plan.times
    training, engine = plan.recipe.training, plan.recipe.engine
    samples = training.batch_size // plan.hardware.num_gpus
    micro_batch = training.micro_batch_size or samples
    mesh = f"{engine.num_replicas} replicas x {plan.hardware.num_gpus // engine.num_replicas} shards, "
    return [
        ("parameters", f"{plan.num_parameters:,}"),
        ("engine", f"{engine.kind}, {mesh if engine.num_replicas > 1 else ''}{training.precision}"),
        ("", f"{samples // micro_batch} micro-batch(es) of {micro_batch} on each, batch {training.batch_size}"),
        ("", f"checkpointing {engine.activation_checkpointing}, {'compiled' if engine.compile else 'not compiled'}"),
        ("model FLOPs", f"{plan.flops_per_image / 1e12:.3g} TFLOP to train on an image"),
        ("speed", f"{plan.images_per_second():,.0f} images/s ({plan.images_per_second(slow):,.0f} to "
                  f"{plan.images_per_second(fast):,.0f}), MFU {plan.mfu():.0%}"),
        ("length", f"{plan.days():.2f} days ({plan.days(fast):.2f} to {plan.days(slow):.2f}) for "
                   f"{training.num_images:,} images"),
        ("cost", f"{plan.gpu_hours:,.0f} GPU hours, {plan.dollars:,.0f} dollars"),
    ]  # fmt: skip


def _of_memory(plan: Plan) -> list[tuple[str, ...]]:
    held = [item for item in plan.memory.items if item.device_bytes]
    rows: list[tuple[str, ...]] = [(item.name, f"{item.device_bytes / GIB:.2f} GiB") for item in held]
    rows.append(("reserved", f"{plan.reserved_gib:.2f} GiB"))
    rows.append(("together", f"{plan.needed_gib:.2f} GiB of {plan.gpu.memory_gib:.1f}"))
    if plan.memory.host_peak:
        node = plan.memory.host_peak * plan.hardware.gpus_per_node
        rows.append(("on the host", f"{plan.memory.host_peak / GIB:.2f} GiB, {node / GIB:.0f} GiB of a node"))
    return rows


def _of_step(plan: Plan) -> list[tuple[str, ...]]:
    fast, time, slow = plan.times
    online = plan.recipe.encoders is not None or plan.recipe.objective.image_encoder is not None
    return [
        *([("online encoders", "their time is not counted")] if online else []),
        ("compute", f"{time.compute:.3f} s"),
        ("waiting for the network", f"{time.exposed:.3f} s ({time.exposed_share:.0%}) of {time.communication:.3f} s"),
        ("optimizer", f"{time.optimizer:.3f} s"),
        ("together", f"{time.total:.3f} s ({fast.total:.3f} to {slow.total:.3f})"),
    ]


def _of_storage(plan: Plan) -> list[tuple[str, ...]]:
    read, saved = plan.reading, plan.saving
    return [
        ("reading", f"{read.gb_per_second * 1e3:,.0f} MB/s, {read.requests_per_second:,.1f} requests/s; "
                    f"{read.bytes_per_image / 1e3:,.0f} kB an image"),
        ("a checkpoint", f"{saved.num_bytes / 1e9:,.1f} GB; stops it for {saved.stall_seconds:.2f} s, "
                         f"written in {saved.write_seconds:.0f} s"),
        ("one every", f"{saved.interval_seconds / 60:,.0f} minutes; {saved.best_interval_seconds / 60:,.0f} is best"),
        ("a failure every", f"{saved.failure_hours:,.0f} hours; goodput {saved.goodput:.1%}"),
    ]  # fmt: skip


def _verdict(plan: Plan) -> str:
    return "\n".join(plan.problems()) or f"fits: {plan.needed_gib:.0f} GiB of {plan.gpu.memory_gib:.0f}"


def _lines(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 10**9 else f"{number / 1e6:.0f}M"
