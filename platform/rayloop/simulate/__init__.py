"""A calibration and a plan -> its speed, goodput and cost, on one worker to ten thousand."""
