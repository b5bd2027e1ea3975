"""TensorBoard, Weights & Biases, MLflow and Trackio, fed with what a run writes into metrics.jsonl.

tracker.py says what a tracker is, libraries.py has the four, tracking.py keeps their faults and their
slowness away from the training.
"""
