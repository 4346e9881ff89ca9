// A sandbox. It knows of no proxy, needs no CA and holds no secret.
export default {
  async fetch() {
    return fetch("https://example.com/");
  },
};
