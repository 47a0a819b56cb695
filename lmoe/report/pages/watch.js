"use strict";
// The page of a run that `lmoe watch` serves asks that server what is new.
{
  let { shape, every } = page.data().watched;
  let version = "";
  const said = document.getElementById("state");

  async function ask() {
    try {
      const answer = await fetch(`data.json?version=${encodeURIComponent(version)}`, { cache: "no-store" });
      if (!answer.ok) throw new Error(`${answer.status}`);
      const news = await answer.json();
      if (news.watched.shape !== shape) {
        location.reload();
        return;
      }
      said.textContent = news.state;
      ({ version } = news);
      ({ every } = news.watched);
      if (news.data !== null) page.news(news);
    } catch {
      said.textContent = "lmoe watch does not answer: this is what was known last.";
    }
    setTimeout(ask, 1000 * every);
  }

  setTimeout(ask, 1000 * every);
}
