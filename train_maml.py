"""Meta-train a Transformer: ``python train_maml.py --help``."""

from experiments.training.main import main

if __name__ == "__main__":
    main()
