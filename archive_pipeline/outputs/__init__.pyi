from .paths import OutputError as OutputError
from .paths import output_path as output_path
from .writers import avoid_nodata as avoid_nodata
from .writers import cog_writer as cog_writer
from .writers import storable_nodata as storable_nodata
