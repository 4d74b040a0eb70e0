"""Loading weights strictly, with errors of one line that name the first tensors which do not fit."""

from collections.abc import Mapping, Sequence, Set

from torch import Tensor, nn


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict; `source` says in errors where it comes from.

    Raises ValueError, before anything is loaded, for tensors that are missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    problems = name_problems(state.keys(), expected.keys())
    shapes = [
        f"{name} is {list(state[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} have another shape ({_shown(shapes)})")
    if problems:
        raise ValueError(f"{source} does not fit the model: of its tensors, {'; '.join(problems)}")
    model.load_state_dict(state)


def name_problems(found: Set[str], expected: Set[str]) -> list[str]:
    """How many of the expected names are missing and how many are unexpected, with the first; empty if none."""
    return [
        f"{len(names)} {'is' if len(names) == 1 else 'are'} {what} ({_shown(sorted(names))})"
        for what, names in (("missing", expected - found), ("unexpected", found - expected))
        if names
    ]


def _shown(items: Sequence[str]) -> str:
    return ", ".join([*items[:3], *(["..."] if len(items) > 3 else [])])
