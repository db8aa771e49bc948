"""The parts of tools/bench_peers.py: contenders in processes of their own, limits of the machine, the report."""
