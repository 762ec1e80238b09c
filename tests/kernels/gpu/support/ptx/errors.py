"""What the executor raises: always with the instruction, its line and the block."""


class PtxError(RuntimeError):
    """Anything that the PTX does and must not do, or that the executor does not know."""


class Unsupported(PtxError):
    """An instruction, an operand or a form of one that nobody has written here yet."""


class OutOfBounds(PtxError):
    """An access that lies in no tensor of the launch, or outside of shared memory."""


class Misaligned(PtxError):
    """An address that is no multiple of the size of its access: a fault on the device."""


class Stuck(PtxError):
    """A barrier that some threads never reach, or a warp instruction that only a part of its warp reaches."""


class Hazard(PtxError):
    """Data of an asynchronous instruction was touched before it was waited for."""
