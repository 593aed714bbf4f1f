"""For an environment whose torchvision was built for CUDA and has no operators on a CPU: its import asks for two that
are not there. They are declared, not defined, before torchvision is imported; nothing here resizes with them."""

import sys
from importlib.abc import MetaPathFinder


class Operators(MetaPathFinder):
    """Finds nothing; is asked first."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            import torch

            sys.meta_path.remove(self)
            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            kept.append(self.library)


kept: list[object] = []
sys.meta_path.insert(0, Operators())
