"""Make Triton's interpreter faster without a change of what it computes.

A kernel runs for milliseconds in it, nearly all of which it takes to make objects for the types and
shapes of intermediate results. There are few different ones, so each is made once.
"""

import triton.language as tl
from triton.language.core import block_type
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def save_time():
    """Patch the interpreter of this process."""
    _patch_less_often()
    _make_block_types_once()
    _make_shapes_once()
    _find_numpy_dtypes_once()
    _leave_equal_shapes()
    _compute_overflows_only_for_assertions()


def _patch_less_often():
    """Patch triton.language once per launch.

    By itself the interpreter does so at every call of a function.
    """
    patched = set()
    launch = interpreter.GridExecutor.__call__

    def launch_anew(self, *args, **kwargs):
        patched.clear()  # the interpreter undoes its patches when a launch ends
        return launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        module = id(self.fn.__globals__)
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call


def _make_block_types_once():
    """Copy the attributes of a block's type, which never change, from the first such type."""
    make = block_type.__init__
    known = {}

    def init(self, element_ty, shape):
        sizes = tuple(getattr(size, "value", size) for size in shape)
        key = id(element_ty), sizes  # the attributes refer to element_ty, so that its id stays
        if key not in known:
            make(self, element_ty, shape)
            known[key] = vars(self)
        vars(self).update(known[key])

    block_type.__init__ = init


def _make_shapes_once():
    """Take the shape and the size of a tensor from the first tensor of this shape."""
    make = tl.tensor.__init__
    known = {}

    def init(self, handle, type):
        key = _sizes(type) if type.is_block() else ()
        if key not in known:
            make(self, handle, type)
            known[key] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known[key]

    tl.tensor.__init__ = init


def _find_numpy_dtypes_once():
    """Find them by the name of Triton's dtype, without a new table for each question."""
    find = interpreter._get_np_dtype
    known = {}

    def numpy_dtype(dtype):
        if dtype.name not in known:
            known[dtype.name] = find(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = numpy_dtype


def _leave_equal_shapes():
    """Do not compare shapes element by element where both operands have the same."""
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_others(self, lhs, rhs):
        if lhs.type.is_block() and rhs.type.is_block() and _sizes(lhs.type) == _sizes(rhs.type):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_others


def _compute_overflows_only_for_assertions():
    """Leave out the sums and products in 64 bits whose assertion only debug=True executes."""
    look = TritonSemantic.binary_op_sanitize_overflow_impl

    def look_where_asserted(self, lhs, rhs, binary_op):
        if self.builder.options.debug:
            look(self, lhs, rhs, binary_op)

    TritonSemantic.binary_op_sanitize_overflow_impl = look_where_asserted


def _sizes(type):
    return tuple(type.shape)
