"""The scripts in examples/benchmarks do what their first lines say, on images a few seconds old."""
