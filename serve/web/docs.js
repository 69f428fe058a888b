// The description of the API, to be read and tried. It is told no key: "Authorize" asks for one, and forgets it with the page.

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#docs",
  deepLinking: true,
  validatorUrl: null, // else Swagger's own server is asked whether the description is valid
});
