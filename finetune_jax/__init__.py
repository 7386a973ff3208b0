"""Fine-tuning of pretrained models in JAX: strategies as data, frozen parts frozen.

Arrays in `models/`, `tasks/`, `losses.py`, `metrics.py` and `augment.py` carry their
shape in their name, one letter an axis:

    B  batch            H, W, C  height, width, channels of an image
    F  features         K        classes
    T  tokens           D        width of a token
    N  heads

Pytrees carry none. Parameter names are the path in the tree, joined by `/`, beginning
with the stage: `stage1/block1/conv1/kernel`.
"""

__version__ = "0.1.0"
