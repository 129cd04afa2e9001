"""What a run will need, from the compiler, without the run: memory, arithmetic, communication and
time per step.
"""
