"""What `megadit checkpoint ls` and `verify` print."""

from collections.abc import Sequence
from pathlib import Path

from megadit.training.checkpoint import folders
from megadit.training.checkpoint.reader import find_damage


def list_checkpoints(run: Path) -> str:
    """A table of the checkpoints of a run, oldest first. Raises CheckpointError where there is none."""
    lines = [f"{'checkpoint':<20}{'images seen':>14}{'stage':>7}{'steps':>12}{'GB':>10}  weights, state"]
    for path in folders.existing(run, []):
        damage = find_damage(path, contents=False)
        try:
            header = folders.read_header(path)
        except (OSError, ValueError):
            lines.append(
                f"{path.name:<20}{folders.images_seen(path):>14,}{'?':>7}{'?':>12}{'?':>10}  damaged: {damage}"
            )
            continue
        kinds = " ".join(["weight", *header.averages])
        lines.append(
            f"{path.name:<20}{header.images_seen:>14,}{header.stage:>7}{header.num_steps:>12,}"
            f"{header.num_bytes / 1e9:>10.3f}  "
            f"{kinds}, {f'damaged: {damage}' if damage else 'all files there'}"
        )
    return "\n".join(lines)


def verify_checkpoints(run: Path, images: Sequence[int]) -> tuple[list[str], int]:
    """One line for each checkpoint, and how many are damaged.

    Without `images` all of the run. Raises CheckpointError where there is none, or not the one that is asked for.
    """
    damages = {path.name: find_damage(path) for path in folders.existing(run, images)}
    lines = [f"{name}: {f'damaged: {damage}' if damage else 'whole'}" for name, damage in damages.items()]
    return lines, sum(damage is not None for damage in damages.values())
