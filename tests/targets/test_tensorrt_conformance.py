"""The tensorrt target holds what every target owes its users."""

from __future__ import annotations

from tests.target_conformance import TargetConformance
from vlexport.core.artifact import Session
from vlexport.targets.tensorrt.session import EmulatedSession


class TestTensorRT(TargetConformance):
    """Thread counts are those of ONNX Runtime, which stands in."""

    target_name = "tensorrt"

    def threads_of(self, session: Session) -> int | None:
        assert isinstance(session, EmulatedSession)
        return int(session._session.get_session_options().intra_op_num_threads)
