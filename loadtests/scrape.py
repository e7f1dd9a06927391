"""Read chosen metrics of servers onto the run's time axis. Nothing is read unless the scenario says so."""

import asyncio
import os
from collections.abc import Sequence

import aiohttp

from loadtests.pages import parse_page
from loadtests.prometheus import parse_series, read_series
from loadtests.record import Sample
from loadtests.runner import Execution
from loadtests.scenario import Scrape

EVERY_S = 1.0
TIMEOUT_S = 5.0


class Scraper:
    """Reads one page again and again until cancelled; a reading that fails leaves a gap."""

    def __init__(self, scrape: Scrape, key: str | None) -> None:
        """Raises TargetError where its address needs a variable that is not set."""
        page = parse_page(scrape.url)
        self.name = scrape.name
        self.reads = 0
        self.errors: dict[str, int] = {}  # kind to how often
        self._url = page.url
        self._socket = page.socket_path(os.environ)
        # not compressed: that would cost both sides processor time
        self._headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._series = {f"{scrape.name}:{text}": parse_series(text) for text in scrape.series}

    async def watch(self, run: Execution) -> None:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        connector = aiohttp.UnixConnector(self._socket) if self._socket else None
        async with aiohttp.ClientSession(timeout=timeout, headers=self._headers, connector=connector) as session:
            await asyncio.sleep(-run.clock())
            while True:
                try:
                    page = await self._read(session)
                except (aiohttp.ClientError, TimeoutError) as exc:
                    kind = str(exc.status) if isinstance(exc, aiohttp.ClientResponseError) else type(exc).__name__
                    self.errors[kind] = self.errors.get(kind, 0) + 1
                else:
                    read = ((name, read_series(page, series)) for name, series in self._series.items())
                    run.samples.append(Sample(run.clock(), {name: value for name, value in read if value is not None}))
                self.reads += 1
                await asyncio.sleep(EVERY_S - run.clock() % EVERY_S)

    async def _read(self, session: aiohttp.ClientSession) -> str:
        async with session.get(self._url) as response:
            response.raise_for_status()
            return await response.text("utf-8", errors="replace")


def scraping_report(scrapers: Sequence[Scraper]) -> dict[str, str]:
    """Of each page that could not always be read, how often, and why."""
    return {
        scraper.name: f"{sum(scraper.errors.values())} of {scraper.reads} readings failed: {', '.join(scraper.errors)}"
        for scraper in scrapers
        if scraper.errors
    }
