"""What may change: the marks of the schema's fields, and stages as recipes of their own."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import yaml
from typer.testing import CliRunner

from megadit import models, objectives, optimizers
from megadit.cli import app
from megadit.node import Mark, Node
from megadit.recipe import Recipe, RecipeError, dump, load, mark_of, parse_text, plan, stages_of
from megadit.recipe.schema import SECTIONS

STAGES = "stages=[{name: low}, {name: high, training: {num_images: 6400, batch_size: 128}, model: {input_size: 32}}]"


def fields(node: type[Node], path: str = "", inherited: bool = False) -> Iterator[tuple[str, bool]]:
    """Every key of the shipped schema, and whether it or a section that it is in has a mark."""
    for name, field in node.model_fields.items():
        marked = inherited or any(isinstance(item, Mark) for item in field.metadata)
        kinds = list(SECTIONS[name].kinds().values()) if node is Recipe and name in SECTIONS else []
        candidates = kinds or [field.annotation, *get_args(field.annotation)]
        sections = [each for each in candidates if isinstance(each, type) and issubclass(each, Node)]
        for section in sections:
            yield from fields(section, f"{path}{name}.", marked)
        if not sections:
            yield f"{path}{name}", marked


def test_every_field_is_marked() -> None:
    found = dict(fields(Recipe))
    assert len(found) > 80
    assert [key for key, marked in found.items() if not marked] == []
    assert {"model.repa.block", "objective.repa.weight", "optimizer.betas", "data.url"} <= found.keys()


@pytest.mark.parametrize(
    ("key", "in_stage", "at_resume"),
    [
        ("model.input_size", True, False),
        ("model.width", False, False),
        ("model.repa.block", False, False),
        ("objective.kind", False, False),
        ("objective.condition_dropout", True, False),
        ("objective.num_loss_bins", True, True),
        ("optimizer.lr", True, False),
        ("training.ema_rates", False, False),
        ("training.micro_batch_size", True, True),
        ("engine.kind", True, True),
        ("engine.num_ranks", False, True),
        ("validation.num_timesteps", True, True),
        ("checkpoints.copy_url", False, True),
        ("eval", False, True),
        ("provenance.anything.in.it", False, True),
    ],
)
def test_marks(key: str, in_stage: bool, at_resume: bool) -> None:
    mark = mark_of(key, load("quickstart"))
    assert mark is not None
    assert (mark.in_stage, mark.at_resume) == (in_stage, at_resume)
    assert mark.in_stage or mark.reason


def test_what_a_module_of_a_user_adds_may_not_change_unless_it_says_so() -> None:
    class Settings(objectives.ObjectiveConfig):
        kind: str = "theirs"
        temperature: float = 1.0

        @property
        def metrics(self) -> tuple[str, ...]:
            return ("theirs",)

        def check_model(self, model: models.ModelConfig) -> None:
            pass

    recipe = load("quickstart").model_copy(update={"objective": Settings()})
    mark = mark_of("objective.temperature", recipe)
    assert mark is not None
    assert (mark.in_stage, mark.at_resume) == (False, False)
    assert mark_of("objective.condition_dropout", recipe) == mark_of("objective.condition_dropout", load("quickstart"))


def test_a_schedule_says_whether_it_depends_on_the_length() -> None:
    for schedule in ("constant", "cosine"):
        config = optimizers.OPTIMIZERS.get("adamw").config(lr=1, warmup_steps=3, schedule=schedule)
        factors = [[config.lr_factor(step, num_steps) for step in range(10)] for num_steps in (10, 20)]
        assert config.depends_on_length == (factors[0] != factors[1])


def test_stages_are_recipes() -> None:
    recipe = load("quickstart", [STAGES])
    low, high = stages_of(recipe)
    assert low == load("quickstart")
    changes = ["training.num_images=6400", "training.batch_size=128", "model.input_size=32"]
    assert high == load("quickstart", changes)
    assert [(stage.first_image, stage.last_image, stage.first_step) for stage in plan(recipe)] == [
        (0, 51_200, 0),
        (51_200, 57_600, 800),
    ]
    assert parse_text(dump(recipe), "dumped") == recipe
    assert stages_of(low) == (low,)
    longer = load("quickstart", [STAGES, "stages.1.training.num_images=12800", "stages.0.seed=0"])
    assert stages_of(longer)[1].training.num_images == 12_800


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            "[{}, {model: {width: 64}}]",
            "stage 1: model.width = 64: no stage may change it: the weights are those of this",
        ),
        ("[{}, {name: b, seed: 3}]", "stage b: seed = 3: no stage may change it: weights, order and noise are drawn"),
        ("[{}, {engine: {num_ranks: 4}}]", "engine.num_ranks = 4: no stage may change it: one command starts"),
        ("[{}, {training: {ema_rates: [0.5]}}]", r"ema_rates = \[0.5\]: no stage may change it: an average is of all"),
        ("[{}, {training: {bath_size: 3}}]", r"stage 1: unknown key 'training\.bath_size'; did you mean 'batch_size'"),
        ("[{}, {training: 3}]", "stage 1: training = 3: "),
        ("[{}, {training: {num_images: 65}}]", "stage 1: training: num_images 65 must be a multiple of batch_size 64"),
        ("[{}, {optimizer: {lr: yes}}]", "stage 1: optimizer.lr = 'yes': Input should be a valid number"),
        ("[{}, {optimizer: {lr: true}}]", "stage 1: optimizer.lr = True: must be a number"),
        ("[{start_from: weights}]", "stage 0: start_from = 'weights': the first stage has none before it"),
        ("[{}, {start_from: ema_0.5}]", r"start_from = 'ema_0\.5': allowed: weights, ema_0\.99"),
        ("[{name: a}, {name: a}]", r"stages\.1\.name = 'a': must be text, another one for each stage"),
        ("[{}, {stages: [{}]}]", r"stage 1: stages = \[\{\}\]: no stage may change it"),
        ("[3]", r"stages\.0 = 3: Input should be a valid dictionary"),
    ],
)
def test_what_a_stage_cannot_be(stages: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load("quickstart", [f"stages={stages}"])


@pytest.mark.parametrize("override", ["stages.2.name=c", "stages.x=3", "stages.-1.name=c"])
def test_places_that_a_list_does_not_have(override: str) -> None:
    with pytest.raises(RecipeError, match="stages is a list of 2, counted from 0; not "):
        load("quickstart", [STAGES, override])


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def test_show_has_a_line_for_each_stage() -> None:
    said = invoke("recipe", "show", "mmdit-stages-cpu").stdout
    assert "stage low (1 of 2): images 1 to 4,800 in 150 steps of 32\n" in said
    assert "stage high (2 of 2): images 4,801 to 6,400 in 100 steps of 16, from ema_0.99: data.url=" in said
    assert yaml.safe_load(said.split("\n\n")[0])["stages"][1]["model"] == {"input_size": 24}


@pytest.mark.parametrize(
    "command",
    [
        ("bench", "train", "quickstart"),
        ("bench", "peers", "quickstart"),
        ("coord-check", "quickstart"),
        ("verify-trajectory", "quickstart"),
        ("sweep", "quickstart", "--space", "optimizer.lr=1,2"),
    ],
    ids=lambda command: command[0],
)
def test_commands_that_take_one_stage_say_so(command: tuple[str, ...]) -> None:
    result = invoke(*command, STAGES)
    assert isinstance(result.exception, ValueError)
    assert "takes a recipe of one stage, this one has 2: stages=[] leaves the top level alone" in str(result.exception)
