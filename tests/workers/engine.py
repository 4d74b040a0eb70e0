"""One rank of an engine: initial weights, three steps, then the losses with other weights and with its own again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megadit import engines, objectives
from megadit.data.loading.loader import Loader
from megadit.distributed import process_group
from megadit.engines import base
from megadit.recipe import Recipe
from megadit.training.ema import Averages

Part = tuple[int, Tensor]  # offset and values of the range of a flat tensor that this rank owns


def main(recipe: Recipe, lr_factors: list[float]) -> dict[str, Any]:
    with process_group(recipe.engine.kind != "single", num_replicas=recipe.engine.num_replicas) as topology:
        engine = engines.build(recipe, topology)
        objective = objectives.build(recipe.objective, recipe.model, engine.device)
        averages = Averages(engine.shards, recipe.training.ema_rates)

        def parts(values: Mapping[str, Tensor]) -> dict[str, Part]:
            return {name: (engine.shards[name].offset, flat.detach().clone()) for name, flat in values.items()}

        def weights() -> dict[str, Part]:
            return parts({name: shard.values for name, shard in engine.shards.items()})

        found: dict[str, Any] = {"initial": weights(), "losses": [], "norms": []}
        data = topology.data
        stream = Loader(recipe.data, recipe.seed, recipe.training.batch_size, data.rank, data.size).iterate(0)
        for step, factor in enumerate(lr_factors, 1):
            batch = next(stream)
            timestep_B = objective.timesteps(batch.timestep_uniform)
            result = engine.train_step([lambda m, b=batch, t=timestep_B: objective.losses(m, b, t)], factor)
            averages.update(step)
            found["losses"].append(result.losses.total_B)
            found["norms"].append(result.grad_norm)
        found["groups"] = [
            {key: group[key] for key in ("lr", "weight_decay", "eps", "betas")}
            for group in engine._optimizer.param_groups
        ]
        found["weight"] = weights()
        found["ema"] = parts(averages.by_name()["ema_0.9"])
        found["moments"] = [
            parts({name: slots[slot] for name, slots in engine.optimizer_state().items()})
            for slot in ("exp_avg", "exp_avg_sq")
        ]

        batch = next(stream)

        def evaluate() -> Tensor:
            losses = engine.evaluate(lambda model: objective.losses(model, batch, 1000 * batch.timestep_uniform))
            return losses.total_B

        found["own"] = evaluate()
        with base.replaced_weights(engine, averages.by_name()["ema_0.9"]):
            found["replaced"] = evaluate()
        found["own again"] = evaluate()
        found["weight again"] = weights()
        assert all(torch.isfinite(loss).all() for loss in found["losses"])
        return found
