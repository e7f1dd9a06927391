import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from loadtests.errors import TargetError
from loadtests.runner import Execution
from loadtests.scenario import Scrape
from loadtests.scrape import Scraper, scraping_report
from tests.loadtests.server import FakeServer, until

WANTED = ["depth", 'depth{engine="1"}', "absent"]


@pytest.mark.slow
async def test_a_page_is_read_every_second_and_a_failed_reading_leaves_a_gap(server: FakeServer) -> None:
    server.page = 'depth{engine="0"} 1\ndepth{engine="1"} 2\n'
    scraper = Scraper(Scrape(name="engine", url=f"{server.url}/metrics", series=WANTED), "lk-metrics")
    away = Scraper(Scrape(name="away", url="http://127.0.0.1:1/metrics", series=["depth"]), None)
    run = Execution([])
    watching = [asyncio.create_task(one.watch(run)) for one in (scraper, away)]
    await until(lambda: len(run.samples) == 1)
    server.status = 503
    await until(lambda: bool(scraper.errors))
    server.status, server.page = 200, "depth 7"
    await until(lambda: len(run.samples) == 2)
    for task in watching:
        task.cancel()
    await asyncio.gather(*watching, return_exceptions=True)
    first, last = run.samples
    assert first.values == {"engine:depth": 3.0, 'engine:depth{engine="1"}': 2.0}
    assert last.values == {"engine:depth": 7.0}
    assert last.at_s > first.at_s + 1
    assert {authorization for _, _, authorization, _ in server.deeds} == {"Bearer lk-metrics"}
    report = scraping_report([scraper, away])
    assert "1 of" in report["engine"]
    assert "503" in report["engine"]
    assert "Connect" in report["away"]


async def test_a_page_is_read_over_a_unix_socket_whose_path_the_environment_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def page(request: web.Request) -> web.Response:
        return web.Response(text=f"depth {len(request.path)}")

    app = web.Application()
    app.router.add_get("/some/metrics", page)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "engine.sock")).start()
    scrape = Scrape(name="engine", url="unix:${FOLDER}/engine.sock:/some/metrics", series=["depth"])
    with pytest.raises(TargetError, match="FOLDER is not set"):
        Scraper(scrape, None)
    monkeypatch.setenv("FOLDER", str(tmp_path))
    run = Execution([])
    watching = asyncio.create_task(Scraper(scrape, None).watch(run))
    await until(lambda: bool(run.samples))
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await runner.cleanup()
    assert run.samples[0].values == {"engine:depth": 13.0}


async def test_a_socket_that_is_not_there_leaves_a_gap() -> None:
    scraper = Scraper(Scrape(name="engine", url="unix:/nowhere/engine.sock:/metrics", series=["depth"]), None)
    watching = asyncio.create_task(scraper.watch(run := Execution([])))
    await until(lambda: bool(scraper.errors))
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert not run.samples
    assert "UnixClientConnectorError" in scraping_report([scraper])["engine"]
