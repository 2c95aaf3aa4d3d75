"""Does pytest have the fixture `mesh` where a project asks for it?"""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]


@pytest.mark.processes
def test_the_fixture_is_there_by_one_line(pytester: pytest.Pytester) -> None:
    """In a project of somebody else: an application, and tests of how it behaves while reviews fails."""
    pytester.makeconftest('pytest_plugins = ["meshlib.pytest_plugin"]')
    pytester.makepyfile(
        shop="""
        def page(client):
            answer = client.get("http://reviews:9080/reviews/0")
            return answer.json() if answer.status_code == 200 else "no reviews"
        """,
        test_shop="""
        import shop

        def test_reviews_are_shown(mesh):
            mesh.service("reviews:9080").responds(200, json=["good"])
            with mesh.Client() as client:
                assert shop.page(client) == ["good"]

        def test_a_page_without_reviews(mesh):
            reviews = mesh.service("reviews:9080").fails(503)
            with mesh.Client() as client:
                assert shop.page(client) == "no reviews"
            assert len(reviews.received) == 1

        def test_each_test_has_its_own(mesh):
            assert mesh.calls == []
        """,
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:asyncio", "-W", "error")
    result.assert_outcomes(passed=3)
    listed = pytester.runpytest_subprocess("--fixtures", "-p", "no:cacheprovider", "-p", "no:asyncio")
    listed.stdout.fnmatch_lines(["mesh*pytest_plugin.py*", "*FakeMesh*"])
