"""The onnxruntime target holds what every target owes its users."""

from __future__ import annotations

from tests.target_conformance import TargetConformance
from vlexport.core.artifact import Session
from vlexport.targets.onnxruntime.session import OnnxRuntimeSession


class TestOnnxRuntime(TargetConformance):
    """Thread counts are read from the session itself."""

    target_name = "onnxruntime"

    def threads_of(self, session: Session) -> int | None:
        assert isinstance(session, OnnxRuntimeSession)
        return int(session._session.get_session_options().intra_op_num_threads)
