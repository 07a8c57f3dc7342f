"""What measures the method rather than applies it: sweeps over towers and data sets,
and speed of the operators."""
