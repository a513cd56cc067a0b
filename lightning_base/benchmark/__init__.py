"""What is promised about speed, measured: ``python experiments/benchmark.py``. Top layer: nothing imports it."""
