// A page that is opened as a file may start no worker, which the search needs: a hidden frame takes its place.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.ready = new Promise((resolve) => this.frame.addEventListener("load", resolve));
      this.frame.srcdoc = `<script>
        postMessage = (data) => frameElement.dispatchEvent(new CustomEvent("answer", { detail: data }));
      </script><script src="${url}"></script>`;
      this.frame.addEventListener("answer", ({ detail }) => {
        this.dispatchEvent(new MessageEvent("message", { data: detail }));
      });
      const attach = () => document.body.append(this.frame);
      document.body ? attach() : addEventListener("DOMContentLoaded", attach);
    }
    postMessage(data) {
      this.ready.then(() => {
        this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
      });
    }
  };
}
