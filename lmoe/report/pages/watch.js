"use strict";
// The page of a run that `lmoe watch` serves asks that server what is new.
{
  const { shape } = page.data().watched;
  let { every } = page.data().watched;
  let version = "";
  const said = document.getElementById("state");

  // What the server answers; null: it does not.
  async function answered() {
    try {
      const answer = await fetch(`data.json?version=${encodeURIComponent(version)}`, { cache: "no-store" });
      return answer.ok ? await answer.json() : null;
    } catch {
      return null;
    }
  }

  async function ask() {
    const news = await answered();
    if (news !== null && news.watched.shape !== shape) {
      location.reload();
      return;
    }
    said.textContent = news === null ? "lmoe watch does not answer: this is what was known last." : news.state;
    if (news !== null) ({ version, watched: { every } } = news);
    setTimeout(ask, 1000 * every);
    if (news !== null && news.data !== null) page.news(news); // last: what goes wrong in there is no silence of the server
  }

  setTimeout(ask, 1000 * every);
}
