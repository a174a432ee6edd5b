"""Stand-ins for packages of kernels that have no build for this machine's torch.

SGLang imports names from them where it never calls them on a CPU. Each submodule exists, each name
that is imported from it is a class, and to make or call one raises.
"""

import importlib.abc
import importlib.machinery
import sys
import types


class _Absent(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{cls.__qualname__}.{name}")

    def __call__(cls, *args, **options):
        raise RuntimeError(f"{cls.__qualname__} is a stand-in, which does nothing")


def _absent(name):
    return _Absent(name.rpartition(".")[2], (), {"__qualname__": name})


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{self.__name__}.{name}")


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package):
        self.package = package

    def find_spec(self, fullname, path, target=None):
        if fullname.startswith(f"{self.package}."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


def stand_in(package):
    """Make the package that is being imported a stand-in."""
    sys.modules[package].__class__ = _Module
    sys.meta_path.append(_Submodules(package))
