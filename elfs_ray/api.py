"""What `import elfs_ray` offers beside configs: run the pipeline, look at a finished run, export its coresets."""

import base64
import html
import io
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from elfs_ray.config import Config
from elfs_ray.evaluation import job
from elfs_ray.handover.coreset import read_coreset
from elfs_ray.handover.export import export
from elfs_ray.handover.originals import read_originals
from elfs_ray.pool.images import decode_image
from elfs_ray.runtime.progress import count
from elfs_ray.stages.report import ReportResult
from elfs_ray.stages.select import CoresetResult, SelectResult
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir

SHOWN_IMAGES, SHOWN_PIXELS = 12, 96
MAX_PIXELS = 100_000_000


def run(config: Config) -> "Run":
    """Run the pipeline, then evaluate its coresets if config.evaluate.test_uri is set; return the run.

    Complete work is kept: the same call resumes a run that was stopped. Raises ConfigError, before any work, for a
    config that cannot be run.
    """
    return Run(job.run(config).uri)


class Run(RunDir):
    """A run in its directory: what was selected, as tables, and where its files are.

    coreset: the first coreset as a table with sample_id, uri, pseudo_label, score and rank; coresets: all, by name.
    """

    @cached_property
    def coresets(self) -> Mapping[str, pa.Table]:
        """Return every coreset by the name of its table. Raises FileNotFoundError if none was selected yet."""
        return {name: pa.concat_tables(self.read_table(name)) for name in SelectResult.read(self).coresets}

    @property
    def coreset(self) -> pa.Table:
        """Return the coreset of the first budget, in its order."""
        return self.coresets[schema.CORESET]

    @property
    def coreset_text(self) -> str:
        """Return the path of the list of its uris, one a line."""
        return self.path(schema.coreset_text_file(schema.CORESET))

    @property
    def report(self) -> str:
        """Return the path of the report, a page to open in a browser."""
        return self.path(schema.REPORT_FILE)

    def export(
        self,
        to: str,
        out: str | Path | None = None,
        *,
        coreset: str = schema.CORESET,
        map: Mapping[str, str] | None = None,
        root: str | None = None,
        copies: str | Path | None = None,
    ) -> str:
        """Write a coreset in another tool's format; return the path. See `elfs_ray.export`."""
        return export(self, to, out, coreset=coreset, map=map, root=root, copies=copies)

    def __repr__(self) -> str:
        lines = [f"Run in {self.uri}"]
        selected = self.success_marker(SelectResult.stage)
        if selected is None:
            return f"{lines[0]}, which has no coreset yet"
        result = SelectResult.from_json(selected.result)
        method = selected.config.get("select.method", "")
        lines += [_describe(name, coreset, result.samples, method) for name, coreset in result.coresets.items()]
        lines.append(f"  text     {self.coreset_text}")
        if self.success_marker(ReportResult.stage):
            lines.append(f"  report   {self.report}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the repr with the first images, for a notebook."""
        text = f"<pre>{html.escape(repr(self))}</pre>"
        if self.success_marker(SelectResult.stage) is None:
            return text
        try:
            return text + "".join(map(_thumbnail, self._first_images()))
        except (OSError, ValueError):  # the images may be out of reach from here
            return text

    def _first_images(self) -> list[bytes]:
        first = read_coreset(self, schema.CORESET).first(SHOWN_IMAGES)
        return [original.data for original in read_originals(first, show_progress=False)]


def _describe(name: str, coreset: CoresetResult, num_samples: int, method: str) -> str:
    line = f"  {name:<8} {coreset.rows:,} of {count(num_samples, 'image')} by {method}"
    if coreset.coverage is None:
        return line
    place = "each pseudo-class, then the whole pool" if coreset.coverage["classes_first"] else "the whole pool"
    return (
        f"{line}, covering {place}: mean similarity {coreset.coverage['coreset']:.3f} to the nearest image chosen, "
        f"{coreset.coverage['random']:.3f} with random images"
    )


def _thumbnail(data: bytes) -> str:
    image = decode_image(data, max_pixels=MAX_PIXELS, min_size=SHOWN_PIXELS)
    image.thumbnail((2 * SHOWN_PIXELS, SHOWN_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{encoded}" style="margin:2px">'
