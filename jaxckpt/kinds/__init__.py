"""One kind of block, one place: how it is recognised, what its options are, how it is run."""

from jaxckpt.kinds.base import register_own
from jaxckpt.kinds.cond import Cond
from jaxckpt.kinds.effect import Effect
from jaxckpt.kinds.plain import Plain
from jaxckpt.kinds.scan import Scan

# In the order in which they are asked: effects run once whatever has them, and what is nothing else is plain.
register_own(Effect(), Scan(), Cond(), Plain())
