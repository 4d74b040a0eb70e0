"""What `megadit plan` and `megadit recipe table` do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadit.files import write_text
from megadit.planning import nearest, plan_report
from megadit.planning.machine.assumptions import Assumptions
from megadit.planning.markdown import markdown
from megadit.planning.run_plan import Plan, machine_of, plan
from megadit.planning.trace import compare
from megadit.recipe import RECIPE_FOLDER, load, plan as stages_in_order
from megadit.recipe.schema import Hardware


@dataclass(frozen=True)
class Planned:
    """What to print, and whether the recipe fits as it is."""

    text: str
    tree: dict[str, Any]
    fits: bool


def plan_recipe(
    source: str,
    overrides: Sequence[str],
    asked: Mapping[str, Any],
    assume: Sequence[str],
    fastest: bool,
    trace: bool,
    out: Path | None,
) -> Planned:
    """Plan `source` with `overrides` on the machine that `asked` names, or the recipe. Raises ValueError."""
    assumed = Assumptions.parse(assume)
    hardware = machine_of(load(source, [each for each in overrides if each.startswith("hardware")]), **asked)
    settings = [f"hardware.{key}={value}" for key, value in hardware.model_dump().items()]
    recipe = load(source, [*overrides, *settings])
    blocks, trees, founds, fits = list[str](), list[dict[str, Any]](), list[nearest.Found](), True
    for stage in stages_in_order(recipe):
        planned = plan(stage.recipe, hardware, assumed)
        fits &= planned.fits
        blocks.append(plan_report.as_text(planned, f"{recipe.name}, {stage}" if recipe.stages else recipe.name))
        tree = plan_report.as_tree(planned)
        if planned.problems() or fastest or out:
            found = _other_settings(planned, fastest)
            blocks.append(_say_found(found, fastest, hardware))
            tree["found"] = found and {"changes": found.changes, **plan_report.as_tree(found.plan)}
            founds += [found] if found else []
        if trace:
            rows = compare(stage.recipe, hardware.num_gpus, int(assumed.text_tokens))
            blocks.append(plan_report.trace_as_text(rows))
            tree["trace"] = [vars(row) | {"difference": row.difference} for row in rows]
        trees.append(tree)
    if out is not None:
        if len(founds) < len(trees):
            raise ValueError(f"{out} is not written: no settings fit {plan_report.describe(hardware)}")
        write_text(out, plan_report.as_recipe(founds, source, overrides, recipe, hardware))
        blocks.append(f"wrote {out}")
    blocks.append(plan_report.assumptions_as_text(assumed))
    return Planned("\n\n".join(blocks), {"stages": trees} if recipe.stages else trees[0], fits)


def table_of_recipes() -> str:
    """Markdown: each shipped recipe that names a machine, on it; one with stages has a row for each."""
    rows = []
    for path in sorted(RECIPE_FOLDER.glob("*.yaml")):
        recipe = load(path.stem)
        if recipe.hardware is None:
            continue
        for stage in stages_in_order(recipe):
            planned = plan(stage.recipe, machine_of(stage.recipe, None, None, None), Assumptions())
            name = f"{path.stem} {stage.name}" if recipe.stages else path.stem
            rows.append((planned.num_parameters, path.stem, stage.number, plan_report.as_row(planned, name)))
    return markdown(plan_report.TABLE_HEADER, [row for *_, row in sorted(rows)])


def _other_settings(planned: Plan, fastest: bool) -> nearest.Found | None:
    if fastest:
        return nearest.fastest(planned)
    return nearest.nearest(planned) if planned.problems() else nearest.Found(planned, {})


def _say_found(found: nearest.Found | None, fastest: bool, hardware: Hardware) -> str:
    if found is None:
        return f"no settings fit {plan_report.describe(hardware)}: take more GPUs, or larger ones"
    kind = "the fastest settings" if fastest else "the nearest settings that fit"
    still = "".join(f"\n  {problem}" for problem in found.plan.problems())
    return f"{kind}: {plan_report.found_as_text(found)}{still}"
