"""The program behind ``train_maml.py``: configuration, the meta-training loop, evaluation and reports."""
