"""What a case of a kernel to be compiled is."""

from __future__ import annotations

from typing import Any

Case = dict[str, Any]
