"""Entry points: `python jobs/X.py --config NAME|FILE --set key=value --output DIR`."""
