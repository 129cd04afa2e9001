"""What a run will need, from the compiler: memory, arithmetic, messages and time of a step."""
