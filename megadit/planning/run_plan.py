"""What a recipe needs and costs on a machine: no GPU, no weights, no rank is started."""

import math
from dataclasses import dataclass

from megadit.parametrization.table import build_table
from megadit.planning.costs.run_cost import DAY, Reading, Saving, reading, saving
from megadit.planning.costs.step_time import StepTime, step_time
from megadit.planning.flops import training_flops
from megadit.planning.machine.assumptions import Assumptions
from megadit.planning.machine.gpus import Gpu, gpu_called
from megadit.planning.machine.network import Network
from megadit.planning.memory import Memory, predict
from megadit.recipe import Recipe, check_world_size
from megadit.recipe.schema import Hardware

GIB = 2**30
MOST_EXPOSED = 0.1  # of a step: a run that waits longer for its network is bound by it


@dataclass(frozen=True)
class Plan:
    """The numbers of one recipe on one machine; of times there are three: low (fast), expected, high (slow)."""

    recipe: Recipe
    hardware: Hardware
    gpu: Gpu
    assumed: Assumptions
    num_parameters: int
    flops_per_image: int  # of the model, to train once
    memory: Memory
    times: tuple[StepTime, StepTime, StepTime]
    reading: Reading
    saving: Saving

    @property
    def time(self) -> StepTime:
        """The expected one."""
        return self.times[1]

    @property
    def reserved_gib(self) -> float:
        """Of the GPU, for what a plan cannot see."""
        return self.assumed.reserved_gib + (1 - self.assumed.usable_share) * self.gpu.memory_gib

    @property
    def needed_gib(self) -> float:
        return self.memory.peak / GIB + self.reserved_gib

    @property
    def fits(self) -> bool:
        return self.needed_gib <= self.gpu.memory_gib

    def images_per_second(self, time: StepTime | None = None) -> float:
        return self.recipe.training.batch_size / (time or self.time).total

    def mfu(self, time: StepTime | None = None) -> float:
        """Model FLOPs utilisation of the GPU's peak."""
        peak = 1e12 * self.gpu.tflops[self.recipe.training.precision]
        return self.images_per_second(time) * self.flops_per_image / (self.hardware.num_gpus * peak)

    def days(self, time: StepTime | None = None) -> float:
        """Of the whole run, with what failures take."""
        seconds = self.recipe.training.num_images / self.images_per_second(time)
        return math.inf if not self.saving.goodput else seconds / self.saving.goodput / DAY

    @property
    def gpu_hours(self) -> float:
        return self.days() * 24 * self.hardware.num_gpus

    @property
    def dollars(self) -> float:
        return self.gpu_hours * (self.assumed.dollars_per_gpu_hour or self.gpu.dollars_per_hour)

    def problems(self) -> list[str]:
        """What is wrong with running this; empty where it can be run as it is."""
        found = []
        if not self.fits:
            found.append(f"does not fit: {self.needed_gib:.0f} GiB of {self.gpu.memory_gib:.0f}")
        if self.time.exposed_share > MOST_EXPOSED:
            found.append(f"communication-bound: {self.time.exposed_share:.0%} of a step is waiting for the network")
        return found


def machine_of(recipe: Recipe, gpu: str | None, num_nodes: int | None, gpus_per_node: int | None) -> Hardware:
    """What the options say, else what the recipe is made for, else one node. Raises ValueError for an unknown GPU."""
    stated = recipe.hardware
    name = gpu or (stated.gpu if stated else None)
    if name is None:
        raise ValueError("the recipe names no hardware: give --gpu, such as --gpu h100")
    known = gpu_called(name)
    same = stated is not None and stated.gpu == name
    per_node = gpus_per_node or (stated.gpus_per_node if stated and same else known.gpus_per_node)
    return Hardware(gpu=name, num_nodes=num_nodes or (stated.num_nodes if stated else 1), gpus_per_node=per_node)


def plan(recipe: Recipe, hardware: Hardware, assumed: Assumptions) -> Plan:
    """The plan of a recipe without stages. Raises ValueError for ranks that cannot share it."""
    gpu, num_gpus = gpu_called(hardware.gpu), hardware.num_gpus
    require_shareable(recipe, num_gpus)
    num_parameters = sum(math.prod(spec.shape) for spec in build_table(recipe))
    network = Network(gpu, num_gpus, hardware.gpus_per_node, recipe.engine.num_replicas, assumed)
    shares = (assumed.compute_share_high, assumed.compute_share, assumed.compute_share_low)
    fast, expected, slow = (step_time(recipe, network, assumed, num_parameters, share) for share in shares)
    images_per_second = recipe.training.batch_size / expected.total
    tokens = int(assumed.text_tokens)
    return Plan(
        recipe=recipe,
        hardware=hardware,
        gpu=gpu,
        assumed=assumed,
        num_parameters=num_parameters,
        flops_per_image=training_flops(recipe.model, [tokens]),
        memory=predict(recipe, num_gpus, tokens),
        times=(fast, expected, slow),
        reading=reading(recipe, images_per_second, assumed),
        saving=saving(recipe, num_parameters, num_gpus, images_per_second, assumed),
    )


def require_shareable(recipe: Recipe, num_ranks: int) -> None:
    """Raise ValueError, saying what may be, unless so many ranks can run the recipe."""
    engine, training = recipe.engine, recipe.training
    if engine.kind == "single" and num_ranks > 1:
        raise ValueError(f"engine.kind single runs on one GPU, not {num_ranks}; use another engine.kind")
    if training.batch_size % num_ranks:
        raise ValueError(f"training.batch_size {training.batch_size} is no multiple of {num_ranks} ranks")
    check_world_size(recipe, num_ranks)
    if num_ranks % engine.num_replicas:
        raise ValueError(f"engine.num_replicas {engine.num_replicas} does not divide {num_ranks} ranks")
