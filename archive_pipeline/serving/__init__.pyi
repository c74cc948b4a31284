from .options import ServeOptions as ServeOptions
from .server import serve as serve
