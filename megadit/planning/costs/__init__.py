"""What a step and a run take: the roof of compute, time, money, storage, and published runs to compare with."""
