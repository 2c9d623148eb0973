"""Tables, plots and pages out of the data that the other parts return."""

from batchnorm.report.diagnosis_page import write_diagnosis as write_diagnosis
from batchnorm.report.explain_page import write_explanation as write_explanation
from batchnorm.report.gallery import write_gallery as write_gallery
from batchnorm.report.page import command as command
from batchnorm.report.page import write_report as write_report
from batchnorm.report.play_page import write_play as write_play
from batchnorm.report.verdict import Finding as Finding
from batchnorm.report.verdict import verdict as verdict

__all__ = [
    "Finding", "command", "verdict", "write_diagnosis", "write_explanation", "write_gallery", "write_play",
    "write_report",
]  # fmt: skip
