from .frames import Frame as Frame
from .report import prepare_report as prepare_report
from .report import write_report as write_report
from .verdict import FlightReport as FlightReport
from .verdict import Tolerances as Tolerances
from .verification import PhotogrammetryOptions as PhotogrammetryOptions
from .verification import PhotogrammetryReport as PhotogrammetryReport
